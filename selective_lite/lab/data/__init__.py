"""Data: pinned assets, and the sentiment, digits and tweets that the experiments learn from."""
