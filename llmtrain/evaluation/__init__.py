"""What a trained model can do: perplexity on texts, answers and choices, tasks of lm-eval."""
