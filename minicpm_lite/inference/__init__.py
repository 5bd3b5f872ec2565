"""Inference: what makes a trained model cheaper to run."""
