"""Smaller files of the model for phones and browsers, if they answer alike. No training."""
