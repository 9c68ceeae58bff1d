"""What a runtime on some hardware can use, as data, and the requests it is measured on."""
