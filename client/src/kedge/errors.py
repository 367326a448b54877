"""The exceptions of the SDK. All are `KedgeError`s with a `reason`; docs/errors.md lists the reasons.

KedgeError
├── InvalidInputError (ValueError)       what was given is wrong by itself
├── NotFoundError (LookupError)          what was named does not exist
├── ConflictError                        it contradicts what exists
├── LeaseError                           the worker's lease does not allow it
├── ResourceExhaustedError               a limit of the server is reached
├── WaitTimeoutError                     it did not happen in time
├── UnavailableError                     no server answers
└── InternalError                        a defect in the server
"""

from kedge.wire.errors import (
    ConflictError,
    InternalError,
    InvalidInputError,
    KedgeError,
    LeaseError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    WaitTimeoutError,
)

__all__ = [
    "ConflictError",
    "InternalError",
    "InvalidInputError",
    "KedgeError",
    "LeaseError",
    "NotFoundError",
    "ResourceExhaustedError",
    "UnavailableError",
    "WaitTimeoutError",
]
