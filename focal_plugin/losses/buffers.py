"""Buffers that stay in float32 when the module is cast."""


class Float32Buffers:
    """A mixin of ``nn.Module``: the buffers in ``float32_buffers`` keep their dtype when the module is cast."""

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self
