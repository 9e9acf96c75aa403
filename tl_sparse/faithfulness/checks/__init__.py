"""The checks of the faithfulness suite, one file each."""
