"""Every error that a user can cause, by kind.

A request or a setting that is wrong raises `ValidationError` before anything is allocated; it names the parameter and the
way out, and the engine serves the next request. A checkpoint that is wrong raises `CheckpointError`, and a
start for which memory is too small `NotEnoughMemoryError`. After `EngineDeadError` nothing more will come from that engine.

    try:
        llm.generate(prompts, SamplingParams(temperature=3.0))
    except ValidationError as error:
        error.parameter  # "temperature"
"""


class ValidationError(ValueError):
    """A value that a user gave is wrong: `parameter` names it, the message says what would be right.

    The name and the two attributes follow vLLM's `VLLMValidationError` (vllm/exceptions.py).
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class UnsupportedError(ValidationError):
    """A value that vLLM or Hugging Face would accept and minivllm does not implement: refused by name, never ignored."""


class NotEnoughMemoryError(ValidationError):
    """Memory ran out at start: the message says in which phase, `parameter` names the knob to turn first."""


class CheckpointError(ValueError):
    """A model folder or a weight file is missing, incomplete or not what its config says."""


class EngineDeadError(RuntimeError):
    """The engine's thread has ended, by `close()` or by a failure; requests in flight get this error."""
