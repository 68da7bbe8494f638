"""Execution: artifact format, page pool, scheduler, sampler, engine. Sequences and pages, never a layer."""
