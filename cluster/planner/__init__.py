"""The layout planner: which (dp, tp, ep, pp), ZeRO stage, recompute and microbatch trains fastest.

Arithmetic only: no torch, no Ray, nothing is run. README.md says what is modelled, by which
formulas, and how far it is from published figures.
"""
