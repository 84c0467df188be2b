"""The forward noise process of a diffusion model.

x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = prod(1 - beta) and sigma_t^2 = 1 - alpha_t^2
(Ho et al., arXiv 2006.11239, equation 4).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from oal_jax.errors import UserError


class NoiseSchedule(NamedTuple):
    """A discrete variance-preserving schedule; hashable, so that it can be a static argument."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    prediction_type: str = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """From the content of a `scheduler_config.json` of diffusers.

        Raises:
            UserError: betas or a prediction type that are not supported.
        """
        if config.get("trained_betas") is not None:
            raise UserError("scheduler_config.json: trained_betas is not supported")
        schedule = cls(
            train_steps=config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            beta_schedule=config.get("beta_schedule", "linear"),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", False),
            prediction_type=config.get("prediction_type", "epsilon"),
        )
        if schedule.beta_schedule not in ("linear", "scaled_linear"):
            raise UserError(f"beta_schedule {schedule.beta_schedule!r} is not supported")
        if schedule.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction_type {schedule.prediction_type!r} is not supported")
        return schedule

    def alphas_cumprod(self) -> np.ndarray:
        """alpha_t^2 for t = 0 .. train_steps - 1, float64.

        The "scaled linear" schedule is linear in sqrt(beta) (Rombach et al., arXiv 2112.10752).
        """
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.train_steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        return np.cumprod(1.0 - betas)

    def final_alpha_cumprod(self) -> float:
        """alpha^2 of the point that the last step of PNDM and DDIM goes to."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod()[0])
