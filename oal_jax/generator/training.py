"""Trainers of the small Stable Diffusion: the autoencoder, then the text encoder and UNet.

They are pure functions, without a loop. On CPU call one step at a time: the gradient of a
convolution inside a scan is about a hundred times slower there.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator.stable_diffusion import StableDiffusion
from oal_jax.runtime.keys import at_step

Batch = dict[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class GeneratorState:
    """State of either trainer; `ema_params` (average of `params`) is None for the autoencoder."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema_params: Any = None


Init = Callable[[jax.Array], GeneratorState]
TrainStep = Callable[[GeneratorState, Batch], tuple[GeneratorState, Metrics]]


def _optimizer(learning_rate: float, warmup: int, steps: int, weight_decay: float):
    warmup = min(warmup, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        # Only matrices and kernels decay, not gains and biases.
        optax.adamw(
            schedule,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def make_vae_trainer(
    sd: StableDiffusion,
    root_key: jax.Array,
    *,
    steps: int = 3000,
    learning_rate: float = 5e-3,
    warmup: int = 50,
    weight_decay: float = 1e-4,
    kl_weight: float = 5e-4,
) -> tuple[Init, TrainStep]:
    """Trainer of the autoencoder: squared error plus a small KL term.

    Source: arXiv 2112.10752, section 3.1.

    Args:
      sd: the model; only its autoencoder is used.
      root_key: typed key; step n folds in the trainer's name and n.
      steps: length of the cosine schedule.
      learning_rate: peak rate of AdamW.
      warmup: steps of linear warm-up, at most a tenth of `steps`.
      weight_decay: of AdamW, for kernels only.
      kl_weight: weight of the KL divergence per latent element, relative to the squared error per
        pixel of range [-1, 1].

    Returns:
      `init(key) -> state` and `train_step(state, batch) -> (state, metrics)`; batch = {"image":
      (B, H, W, c) in [0, 1]}; metrics are `loss`, `mse`, `kl` and `psnr` (dB).
    """
    optimizer = _optimizer(learning_rate, warmup, steps, weight_decay)

    def init(key: jax.Array) -> GeneratorState:
        params = {"vae": stable.init(sd, "vae", key)}
        return GeneratorState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def loss_fn(params: Any, key: jax.Array, images: Float[Array, "B H W c"]):
        flip_key, noise_key = jax.random.split(key)
        flipped = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(flipped, jnp.flip(images, 2), images)
        pixels = stable.pad_images(sd, images) * 2.0 - 1.0
        mean, log_variance = stable.encode_pixels(sd, params, pixels)
        noise = jax.random.normal(noise_key, mean.shape)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        decoded = stable.decode_pixels(sd, params, latents)
        mse = jnp.mean((decoded - pixels) ** 2)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        loss = mse + kl_weight * kl
        psnr = 10.0 * jnp.log10(4.0 / mse)  # the range of pixels is 2
        return loss, {"loss": loss, "mse": mse, "kl": kl, "psnr": psnr}

    def train_step(state: GeneratorState, batch: Batch) -> tuple[GeneratorState, Metrics]:
        key = at_step(root_key, "vae", state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, key, batch["image"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return init, train_step


def latent_scale(latents: Float[Array, "N h w C"]) -> float:
    """The factor that gives unscaled latents unit variance (arXiv 2112.10752, appendix G)."""
    return float(1.0 / jnp.std(latents))


def make_diffusion_trainer(
    sd: StableDiffusion,
    root_key: jax.Array,
    prompt_ids: Int[Array, "K L"],
    empty_ids: Int[Array, " L"],
    *,
    steps: int = 2500,
    learning_rate: float = 2e-3,
    warmup: int = 100,
    weight_decay: float = 1e-4,
    condition_dropout: float = 0.1,
    snr_clip: float = 5.0,
    ema_decay: float = 0.998,
) -> tuple[Init, TrainStep]:
    """Joint trainer of the UNet and the text encoder, on stored latents.

    The loss is the squared error of the predicted noise, weighted by min(SNR_t, snr_clip) / SNR_t
    (Hang et al., arXiv 2303.09556, equation 8). Without this weight, nearly clean latents dominate
    the gradient.

    Args:
      sd: the model; its schedule must predict noise ("epsilon").
      root_key: typed key; step n folds in the trainer's name and n.
      prompt_ids: token ids of the K class prompts; a label indexes them.
      empty_ids: token ids of the empty prompt, for classifier-free guidance (arXiv 2207.12598).
      steps: length of the cosine schedule.
      learning_rate: peak rate of AdamW.
      warmup: steps of linear warm-up, at most a tenth of `steps`.
      weight_decay: of AdamW, for matrices and kernels only.
      condition_dropout: probability that an example gets the empty prompt.
      snr_clip: see above.
      ema_decay: decay of the moving average; at most (1 + n) / (10 + n) in step n.

    Returns:
      `init(key) -> state` and `train_step(state, batch) -> (state, metrics)`; batch = {"latent":
      scaled (B, h, w, C), "label": (B,) int32}. Use `state.ema_params` afterwards:
      {"text_encoder", "unet"}.
    """
    if sd.schedule.prediction_type != "epsilon":
        raise ValueError("the diffusion trainer predicts noise")
    optimizer = _optimizer(learning_rate, warmup, steps, weight_decay)
    ids = jnp.concatenate([jnp.asarray(prompt_ids), jnp.asarray(empty_ids)[None]])
    empty_row = ids.shape[0] - 1
    squared_alpha = jnp.asarray(sd.schedule.alphas_cumprod(), jnp.float32)

    def init(key: jax.Array) -> GeneratorState:
        text_key, unet_key = jax.random.split(key)
        params = {
            "text_encoder": stable.init(sd, "text_encoder", text_key),
            "unet": stable.init(sd, "unet", unet_key),
        }
        # A copy: the step gets both trees donated, and a buffer cannot be donated twice.
        ema = jax.tree.map(jnp.copy, params)
        return GeneratorState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)

    def loss_fn(params: Any, key: jax.Array, examples: Batch):
        latents, labels = examples["latent"], examples["label"]
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        batch = latents.shape[0]
        timesteps = jax.random.randint(time_key, (batch,), 0, sd.schedule.train_steps)
        noise = jax.random.normal(noise_key, latents.shape)
        signal = squared_alpha[timesteps][:, None, None, None]
        noisy = jnp.sqrt(signal) * latents + jnp.sqrt(1.0 - signal) * noise
        dropped = jax.random.bernoulli(drop_key, condition_dropout, (batch,))
        rows = jnp.where(dropped, empty_row, labels)
        # The text encoder runs once per prompt, not once per example.
        states = stable.encode_prompts(sd, params, ids)[rows]
        predicted = stable.apply_unet(sd, params, noisy, timesteps, states)
        errors = jnp.mean((predicted - noise) ** 2, axis=(1, 2, 3))
        snr = squared_alpha[timesteps] / (1.0 - squared_alpha[timesteps])
        loss = jnp.mean(errors * jnp.minimum(snr, snr_clip) / snr)
        return loss, {"loss": loss, "mse": jnp.mean(errors)}

    def train_step(state: GeneratorState, batch: Batch) -> tuple[GeneratorState, Metrics]:
        key = at_step(root_key, "diffusion", state.step)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema_params, 1.0 - decay)
        state = GeneratorState(state.step + 1, params, opt_state, ema)
        return state, metrics

    return init, train_step
