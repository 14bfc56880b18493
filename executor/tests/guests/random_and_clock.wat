;; Asks for 64 KiB of randomness and for the time, for ever.
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "_start")
    (loop $again
      (drop (call $random (i32.const 65536) (i32.const 65536)))
      (drop (call $clock (i32.const 0) (i64.const 1) (i32.const 0)))
      (br $again))))
