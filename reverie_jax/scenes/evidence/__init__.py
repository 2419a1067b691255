"""The evidence: what each way of tuning does, measured on drawn scenes."""
