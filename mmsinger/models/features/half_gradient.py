"""Gradients through float16 without a loss scaler."""
from torch import Tensor


class HalfGradient:
    """Keeps a gradient that passes through float16 within its range.

    A gradient of 1e-9, usual for a mean over many tokens, is 0 in float16.
    Where it comes in it is scaled, so that its largest component is 16, and
    scaled back where it goes out. Nothing waits for the device, and a
    GradScaler around it does no harm::

        scale = HalfGradient()
        output = scale.leave(block(scale.enter(values).half()).float())
    """

    def enter(self, values: Tensor) -> Tensor:
        """What goes in, before it is cast (any shape)."""
        values = values.view_as(values)
        values.register_hook(lambda grad: grad / self._scale)
        return values

    def leave(self, values: Tensor) -> Tensor:
        """What comes out, after it was cast back (any shape)."""
        values.register_hook(self._enlarge)
        return values

    def _enlarge(self, grad: Tensor) -> Tensor:
        self._scale = 16 / grad.abs().amax().clamp(min=1e-30)
        return grad * self._scale
