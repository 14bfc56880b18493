"""Models of this device, served to the pool and to this machine's programs, and the way to the models of others.

`service.DeviceModels` is all of it; its `completer` serves guests and programs alike.
"""
