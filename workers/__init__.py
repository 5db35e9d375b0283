"""The data plane: one process a device, which applies plans and computes. It never decides what runs next."""
