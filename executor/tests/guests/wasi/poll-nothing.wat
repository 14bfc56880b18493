;; A wait for nothing is EINVAL.
(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (call $must (i32.eq (call $poll_oneoff (i32.const 0) (i32.const 128) (i32.const 0) (i32.const 256)) (i32.const 28))
      (i32.const 1))))
