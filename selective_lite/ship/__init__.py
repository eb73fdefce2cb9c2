"""Ship: what fine-tuning changed as one small file; applied, reverted, switched, summed, described, and exported."""
