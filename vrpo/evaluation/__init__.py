"""Scores of responses, and the noise of the estimators."""
