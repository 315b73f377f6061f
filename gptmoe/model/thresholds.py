"""Cut-offs learned in training that let an expert decide on a token without seeing the others.

The moving average of Expert Threshold routing (arXiv 2603.11535). Letters: T tokens, E experts.
"""

from torch import Tensor


def averaged(threshold_E: Tensor, cutoff_E: Tensor, updates: int, decay: float) -> Tensor:
    """The average after update number `updates` (1 is the first), which saw `cutoff_E`.

    Equal to m_t / (1 - decay^t) with m_t = decay m_(t-1) + (1 - decay) cutoff_t, the bias-corrected
    exponential average (arXiv 1412.6980, section 3), but kept in corrected form: what is stored is
    what routes. Computed in float64, returned in the type of `threshold_E`.
    """
    rate = (1 - decay) / (1 - decay**updates)
    before_E = threshold_E.double()
    after_E = before_E + rate * (cutoff_E.to(before_E) - before_E)
    return after_E.to(threshold_E.dtype)


def passing(score_TE: Tensor, threshold_E: Tensor, valid_T: Tensor | None) -> Tensor:
    """True where a token's score reaches an expert's threshold, [T, E]; never on padding."""
    take_TE = score_TE >= threshold_E.to(score_TE.dtype)
    return take_TE if valid_T is None else take_TE & valid_T.unsqueeze(1)
