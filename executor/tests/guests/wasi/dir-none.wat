;; No folder was opened beforehand: the first descriptor after the streams is EBADF.
(module
  (import "wasi_snapshot_preview1" "fd_prestat_get" (func $fd_prestat_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (call $must (i32.eq (call $fd_prestat_get (i32.const 3) (i32.const 0)) (i32.const 8)) (i32.const 1))))
