"""Whether Triton can launch anything on this machine."""

import triton


def check_driver() -> None:
    """Let Triton prepare its driver, which compiles a little C; raises what goes wrong there."""
    triton.runtime.driver.active.get_current_target()
