"""A reward with a gradient."""


class Warm:
    """How much more red than blue an image is."""

    needs = {"gradient"}  # noqa: RUF012

    def answer(self, asked):
        return {"warm": self.of(asked.pixels)}

    @staticmethod
    def of(pixels):
        red, _, blue = pixels.mean((2, 3)).unbind(1)
        return red - blue
