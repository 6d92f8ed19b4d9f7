"""What a trained model can do: perplexity on texts, answers to questions, tasks of lm-eval."""
