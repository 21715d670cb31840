"""Sources of images: SDSS frames, a user's own cutouts, and a mock sky. Import the module you need."""
