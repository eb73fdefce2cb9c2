"""Ship: what fine-tuning changed as one small file; applied, reverted, summed, exported."""
