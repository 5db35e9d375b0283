"""Who guesses the tokens that may follow. Whatever a drafter says, what is emitted is what the model would have said without it."""
