"""The part of arm-vision that every engine shares: everything but the arithmetic."""
