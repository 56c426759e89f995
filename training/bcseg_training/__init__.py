"""Makes and judges the models that bcseg-batch runs."""
