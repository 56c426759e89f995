"""Stores of objects (`s3://`, `gs://`, `az://`) as places for photographs and outputs."""
