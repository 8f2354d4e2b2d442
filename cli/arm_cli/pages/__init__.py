"""Interactive pages: one HTML file each, with its data, styles and scripts inside, that requests nothing."""
