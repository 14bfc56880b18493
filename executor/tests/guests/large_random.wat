;; Asks the host for 48 MiB of randomness in one call, again and again, where neither fuel nor epochs reach it.
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (memory (export "memory") 800)
  (func (export "_start")
    (loop $again
      (drop (call $random (i32.const 65536) (i32.const 50331648)))
      (br $again))))
