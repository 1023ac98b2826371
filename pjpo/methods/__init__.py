"""One file per paper: `Config` and a pure `loss(config, batch, logps, ref_logps) -> (Mean, metrics)`."""
