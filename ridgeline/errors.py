"""What can go wrong because of something outside this package, as one tree.

    RidgelineError
    ├── ConfigError         a setting, or two settings together, that cannot be honoured
    ├── ModelNotFoundError  no such path, alias or model package
    ├── CheckpointError     a file that is damaged, inconsistent or of an unsupported kind
    ├── TokenizerError      a vocabulary or chat template that cannot be used
    ├── RequestError        a prompt or sampling parameter that cannot be served
    ├── RankError           a rank of a parallel engine died, hung or lost its network
    └── EngineDeadError     the engine thread stopped; nothing more can be served

A message says what was given, what was expected and what to do. The command line prints it without a
traceback. Our own invariants are `assert`; running out of cache blocks is a normal return, not an error.
"""


class RidgelineError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(RidgelineError, ValueError):
    """A setting, or a combination of settings, that cannot be honoured."""


class ModelNotFoundError(RidgelineError, LookupError):
    """No model at this path or under this alias."""


class CheckpointError(RidgelineError, ValueError):
    """A checkpoint file that is damaged, inconsistent or not supported."""


class TokenizerError(RidgelineError, ValueError):
    """A vocabulary, tokenizer file or chat template that cannot be used."""


class RequestError(RidgelineError, ValueError):
    """A request that can never be served as it stands."""


class RankError(RidgelineError, RuntimeError):
    """A rank of a parallel engine died, hung or lost its network; what was running on it is lost."""


class EngineDeadError(RidgelineError, RuntimeError):
    """The engine stopped after an internal error."""
