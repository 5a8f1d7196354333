"""Photo to features: MobileNetV2, its weights, and `extract`, which everything calls.

No classifier and no table.
"""
