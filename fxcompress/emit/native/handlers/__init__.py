"""What plans hold for each module and function, room by room."""
