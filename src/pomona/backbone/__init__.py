"""Photo to features: MobileNetV2 and its weights. No classifier and no table."""
