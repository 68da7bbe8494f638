"""What a rewrite costs in numbers, and how to make it cost less.

A textbook program is run layer by layer in bounded memory, with the weights of the checkpoint or with others in their
place: quality (perplexity, divergence, damage by layer), calibration, budgets of bits.
"""
