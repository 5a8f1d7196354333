"""The HTTP service: a finished model answers, and nothing is kept. No stage runs here."""
