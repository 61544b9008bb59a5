import pytest

from ridgeline.library import ISAS, load_library


@pytest.fixture(scope="session")
def available_isas() -> set[str]:
    """Instruction sets whose library this machine can run."""
    found = set()
    for isa in ISAS:
        try:
            found.add(load_library(isa)[0])
        except ValueError:
            continue
    return found
