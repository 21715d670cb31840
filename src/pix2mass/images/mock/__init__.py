"""A mock sky with known truth: who is on it (``population``), how SDSS would picture it (``render``), both
(``source``)."""
