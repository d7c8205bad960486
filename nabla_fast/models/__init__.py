"""The only code that knows transformers: language models, reward models, vocabularies, chats."""
