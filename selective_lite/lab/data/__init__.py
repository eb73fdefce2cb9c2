"""What the experiments learn from: assets, batches, sentiment, digits and tweets."""
