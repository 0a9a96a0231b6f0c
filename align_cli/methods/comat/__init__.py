"""CoMat: image-to-text concept matching, attribute concentration and fidelity preservation."""
