"""Checks and quizzes of the chapters on inference."""
