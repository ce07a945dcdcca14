"""WHICH backend to serve with: stored times of one device, one mix of batches, one answer."""
