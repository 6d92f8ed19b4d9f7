"""Answers by sampling and judging: best-of-n, votes, search, rejection sampling, labels for steps."""
