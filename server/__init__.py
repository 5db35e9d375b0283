"""The HTTP endpoint: OpenAI's interface, server-sent events, health and metrics. It never tokenizes and never blocks its loop."""
