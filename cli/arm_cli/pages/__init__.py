"""Interactive pages: one HTML file each, with its data, styles and scripts, without network requests."""
