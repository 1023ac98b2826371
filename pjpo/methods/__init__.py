"""One file per paper: `Config` and a pure `loss(config, batch, logps, ref_logps) -> (Mean, metrics)`."""

from pjpo import modules_of

__getattr__ = modules_of(__name__)
