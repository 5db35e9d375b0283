"""Answers in one piece: the JSON bodies of what was not streamed."""

from headrace.engine.messages.openai.responses import (
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from headrace.server.openai.choices import Choice, chat_logprobs, completion_logprobs, finish_reason, first_token


def chat_completion(head: dict, choices: list[Choice], counts: Usage, logprobs: bool) -> ChatCompletion:
    """All choices have ended."""
    return ChatCompletion(
        choices=[
            ChatChoice(
                index=choice.index,
                message=ChatMessage("assistant", "".join(choice.parts)),
                finish_reason=finish_reason(choice.finish),
                logprobs=chat_logprobs(choice.scores) if logprobs else None,
                stop_reason=choice.finish.stop,
            )
            for choice in choices
            if choice.finish
        ],
        usage=counts,
        **head,
    )


def completion(head: dict, choices: list[Choice], counts: Usage, logprobs: int | None, echo: bool) -> Completion:
    """All choices have ended."""
    return Completion(
        choices=[
            CompletionChoice(
                index=choice.index,
                text=(choice.prompt.prompt_text or "" if echo and choice.prompt else "") + "".join(choice.parts),
                finish_reason=finish_reason(choice.finish),
                logprobs=_logprobs(choice, logprobs) if logprobs is not None else None,
                stop_reason=choice.finish.stop,
            )
            for choice in choices
            if choice.finish
        ],
        usage=counts,
        **head,
    )


def _logprobs(choice: Choice, top: int) -> CompletionLogprobs:
    """Scores of the prompt, where it was to be echoed, and of the completion."""
    prompt = choice.prompt_token_scores or ()
    first = first_token(choice.prompt, prompt) if choice.prompt else ""
    return completion_logprobs([*prompt, *choice.scores], first, 0, top > 0)
