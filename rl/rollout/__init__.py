"""Text from language models: generating it, and scoring what is given."""
