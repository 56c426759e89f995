"""The model that ships with the package; MODEL_CARD.md describes it."""
